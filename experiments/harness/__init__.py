"""What studies stand on: trainings, samples and their measures, and the pages that show them."""
