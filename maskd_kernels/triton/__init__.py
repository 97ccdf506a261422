"""One file per operator: Triton kernels and their launchers. Imported only where Triton is used."""
