"""First names that renaming knows, by the pronoun that goes with them. Words that are also something else stay out."""

from __future__ import annotations

__all__ = ["FEMALE", "MALE", "NEUTRAL"]

_FEMALE = """
Abigail Aisha Alexandra Alice Allison Amanda Amelia Amina Amy Andrea Angela Angelina Anita Ann Anna Anne Annie Ashley
Aubrey Barbara Becky Bella Beth Betsy Betty Bonnie Brenda Briana Brittany Brooke Carla Carly Carmen Carol Caroline
Carolyn Carrie Cassandra Catherine Cheryl Christina Christine Cindy Claire Clara Courtney Cynthia Daisy Dana Daniela
Danielle Darla Debbie Deborah Diana Diane Donna Dora Doris Dorothy Eleanor Elena Elisa Elizabeth Ella Ellen Ellie Elsa
Emily Emma Erica Erin Esther Eva Evelyn Farah Fatima Faye Felicia Fiona Gabriela Gina Gloria Greta Gretchen Gwen Haley
Hana Hannah Heather Helen Helena Irene Isabel Isabella Jackie Jana Jane Janelle Janet Janice Jasmine Jean Jen Jenna
Jennifer Jenny Jessica Jill Joan Joanna Josephine Josie Joyce Juanita Judy Julia Julie Juliet Kara Karen Karla Kate
Katherine Kathy Katie Katrina Katy Kayla Kelsey Kendra Kimberly Krista Kylie Lana Lara Laura Lauren Layla Leah Leila
Lena Leslie Lila Linda Lisa Liza Lizzy Lola Lorraine Louise Lucille Lucy Luna Lydia Mabel Maddie Madeline Maggie Mandy
Marcia Maria Mariam Marie Marissa Marla Marta Martha Mary Maryam Megan Melanie Melissa Mia Michelle Mila Milly Miranda
Miriam Molly Monica Nadia Nancy Naomi Natalia Natalie Nicole Nina Noor Nora Olivia Pam Patricia Paula Pauline Peggy
Phoebe Polly Priya Rachel Rania Rebecca Rita Rosa Rosie Ruth Sally Salma Samantha Samira Sandra Sara Sarah Selena
Serena Shannon Sheila Shelly Sofia Sonia Sophia Sophie Stacy Stella Stephanie Sue Susan Susie Sylvia Tabitha Tamara
Tammy Tanya Tara Teresa Theresa Tiffany Tina Tonya Tracy Ursula Valerie Vanessa Veronica Victoria Wendy Yara Yasmin
Yolanda Zainab Zara Zoe
"""

_MALE = """
Aaron Abdul Adam Adrian Ahmed Alan Albert Alexander Alfred Ali Allan Allen Alvin Andre Andrew Andy Anthony Antonio
Arnold Arthur Barry Ben Benjamin Bernard Bert Billy Bob Bobby Boris Brad Brandon Brendan Brian Bruce Bryan Caleb
Calvin Carl Carlos Cedric Chad Charles Charlie Chester Chris Christopher Clarence Clark Colin Connor Craig Curtis
Cyrus Dan Daniel Danny Darren Dave David Dennis Derek Diego Dominic Donald Donny Douglas Duncan Dustin Dwayne Earl
Eddie Edgar Edward Edwin Eli Elliot Emmanuel Eric Ernest Ethan Eugene Evan Felix Fernando Finn Francis Freddy Gabriel
Gary Geoffrey George Gerald Gilbert Gordon Greg Gregory Hamza Hank Harold Harry Hassan Hector Henry Herbert Howard
Hugo Ian Ibrahim Isaac Ivan Jack Jacob Jake Jamal James Jared Jason Javier Jay Jayden Jeff Jeffrey Jeremy Jerome Jerry
Jesse Jim Jimmy Joe Joel Joey John Johnny Jon Jonah Jonathan Jorge Jose Joseph Josh Joshua Juan Julian Julius Justin
Karim Keith Ken Kenneth Kenny Kevin Khalid Kurt Kyle Larry Lawrence Leo Leon Leonard Liam Lloyd Logan Louis Lucas Luis
Luke Malcolm Manuel Marco Marcos Marcus Mario Martin Marvin Matt Matthew Maurice Michael Miguel Mike Mohamed Moses
Mustafa Nathan Nathaniel Neil Nelson Nicholas Nick Noah Nolan Norman Oliver Omar Oscar Otis Owen Pablo Paco Patrick
Paul Pedro Pete Peter Philip Phillip Quentin Rafael Ralph Ramon Randall Randy Rashid Raymond Ricardo Richard Rick
Robert Roberto Rodney Roger Roland Ron Ronald Ronnie Ross Roy Ruben Rudy Russell Ryan Salim Sam Sami Samuel Scott Sean
Sebastian Seth Shawn Simon Stephen Steve Steven Stuart Tariq Ted Terrence Theo Theodore Thomas Tim Timothy Toby Todd
Tom Tommy Tony Travis Trevor Tyler Tyrone Victor Vincent Walter Wayne William Xavier Yusuf Zachary
"""

_NEUTRAL = """
Alex Casey Jackson Jamie Jess Jessie Jordan Kelly Kim Morgan Pat Quinn Robin Sammy Sasha Taylor Terry
"""

FEMALE = frozenset(_FEMALE.split())
MALE = frozenset(_MALE.split())
NEUTRAL = frozenset(_NEUTRAL.split())
