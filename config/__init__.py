"""Settings of runs. Most files import the adam file of their model and say what differs."""
