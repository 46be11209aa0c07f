"""Readers: files to records, records to raw documents.

- The files of a source: `files`, as streams `streams`, their list and what becomes of each `listing`.
- Which files are read, and as what: `choose`; their splits: `splits`.
- Files of one kind to records (`container`): `archives`, `arrow_tables` (also Parquet), `coco`, `csv_files` (also TSV),
  `folders`, `json_files`, `plain_text`. Sources without files: `built_in`.
- Records to documents: which column is what and the form that follows `columns`, each form `records`, `conversations`, the
  images that records name `images`, values and their faults `values`.
- A whole source: `readers`; what is read of it and what is not: `account`.
"""
