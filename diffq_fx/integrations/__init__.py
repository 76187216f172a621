"""Ways in and out for people whose code already speaks another library; none of them is imported by diffq_fx itself."""
