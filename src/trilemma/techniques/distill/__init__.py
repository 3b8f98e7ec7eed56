"""A small model learns from the answers of a larger one: losses, teachers, students, and a short healing."""
