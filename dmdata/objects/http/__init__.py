"""Objects on the web: http and https URLs, by urllib3, and by obstore where it asks just as we do."""
