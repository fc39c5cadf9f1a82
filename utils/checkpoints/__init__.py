"""What makes and changes models; not carried by saved ones."""
