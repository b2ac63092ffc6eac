"""What is traced: the model as functions of weights and inputs, its weights, the loop, and what a graph costs."""
