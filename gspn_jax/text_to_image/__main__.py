from gspn_jax.text_to_image import main

main()
