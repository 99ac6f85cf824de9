"""y = x W^T straight from the packed form: one entry of `dispatch.KERNELS` a kernel."""
