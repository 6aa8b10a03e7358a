"""Native integer kernels: a C++ library behind a C interface, the form that its weights have, the layers that call it."""
