"""What `dynrl bench` measures: a suite a file."""
