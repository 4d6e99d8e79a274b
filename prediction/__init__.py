"""One's own depth camera: joints of the hand in its frames, and the files that hold them."""
