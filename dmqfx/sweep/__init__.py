"""The sweep: one walk over the graph with the float and the quantized-so-far value of every live tensor."""
