"""Small optional C++ kernels for the CPU, built where a compiler is; a torch op stands beside each of them."""
