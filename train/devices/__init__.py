"""The mesh of devices, and what is split over which of its axes."""
