"""The process that brings model files here, unpacks them and reads their headers."""
