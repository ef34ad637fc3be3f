"""The recipes' data, a file or two for each; sources and licences stand in the .md beside them."""
