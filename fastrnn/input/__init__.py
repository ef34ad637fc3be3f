"""What the input is: its forms, and the one layout of rows that all of them become."""
