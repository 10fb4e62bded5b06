"""What is measured: each op's sizes, cases, inputs, least cost and goals."""
