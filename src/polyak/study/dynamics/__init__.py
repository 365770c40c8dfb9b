"""`polyak dynamics`: what the layers of trained runs do, seen as steps of an optimizer."""
