"""The paper's tables at small scale, and other experiments."""
