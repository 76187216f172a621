"""The size of a model as a function of its bits, and what holds it: tensors in, tensors out. It knows no module and no optimizer."""
