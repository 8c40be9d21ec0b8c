"""Keys, statements and their verification: a version is loaded only if it is what was signed."""
