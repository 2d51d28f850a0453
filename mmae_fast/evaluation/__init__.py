"""What is done with a pretrained encoder: probes, fine-tuning, export, analysis, reports."""
