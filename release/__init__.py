"""What makes and tries the wheels that users install. Not part of the package."""
