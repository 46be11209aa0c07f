"""What it reads: sources of raw documents, and the way from them to prepared, packed rows."""
