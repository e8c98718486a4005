"""The road from a Request to pictures. Importing this package, its requests and its options costs no torch."""
