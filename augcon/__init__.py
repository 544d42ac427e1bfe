"""What AugCon's stage scripts share, a file a concept."""
