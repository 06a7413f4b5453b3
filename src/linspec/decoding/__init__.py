"""The words that drafters, verifiers, models and state share."""
