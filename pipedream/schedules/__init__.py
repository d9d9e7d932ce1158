"""More schedules, and what they cost: rows, plans, files, halves, memory, reasons."""
