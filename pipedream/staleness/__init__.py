"""What old gradients cost: delays, and the best learning rate for each."""
