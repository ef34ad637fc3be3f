"""What is measured, and how: ``python -m bench --help``; results in bench/results/."""
