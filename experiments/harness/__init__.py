"""The base of the studies: trainings, samples and their measures, and pages."""
