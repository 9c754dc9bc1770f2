"""What published systems claim, checked: exactness, bytes, times; `counterpoint reproduce` prints the result."""
