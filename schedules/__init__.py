"""TE computations of the kernel families and their schedule templates."""
