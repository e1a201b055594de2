"""What a train step will take on chips that aren't here."""
