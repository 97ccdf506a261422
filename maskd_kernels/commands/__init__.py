"""What ``maskd-kernels COMMAND`` does, one command a file; ``maskd_kernels.cli`` reads the command line."""
