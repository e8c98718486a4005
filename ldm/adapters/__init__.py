"""What a small file adds to a loaded model: changed layers (`lora`) and new words (`textual_inversion`)."""
