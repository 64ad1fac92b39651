"""Feature extractors, metrics and receipts."""
