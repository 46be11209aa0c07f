"""What people have, read: files to records, records to documents."""
