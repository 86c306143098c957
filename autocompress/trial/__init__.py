"""What becomes of one recipe: its candidate, fine-tuning or what stands in for it, file and measurement."""
