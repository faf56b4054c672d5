"""From the student's states to the teacher's."""
