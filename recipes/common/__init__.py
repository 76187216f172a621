"""What all recipes share: settings, methods, the training loop, and what is made of a trained model."""
