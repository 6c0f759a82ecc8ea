"""Takes away one component of a training at a time, and tells what each is worth."""
