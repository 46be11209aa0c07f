"""Sources of raw documents, and how they become prepared, packed rows."""
