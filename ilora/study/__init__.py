"""What only the book and its tables need: results read and compared, gradients, figures, widgets."""
