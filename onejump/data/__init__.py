"""Sets of images: `image_set` says what one is, `digits` and `folder` where they come from."""
