"""Who may ask what of which provider."""
