"""What is read off a model, and how it is taken apart. No model class is special-cased."""
