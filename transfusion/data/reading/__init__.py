"""Readers: files to records, records to raw documents."""
