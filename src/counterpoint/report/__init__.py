"""Pictures, pages and tables of timelines, measured or simulated."""
