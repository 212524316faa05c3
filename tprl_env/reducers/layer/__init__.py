"""Methods that drop visual tokens between decoder layers, one file each."""
