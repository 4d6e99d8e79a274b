"""One depth frame: cameras, files, crops, the cache, the hand finder and drawing."""
